"""From a folder to a quantized folder, layer by layer: no network is ever whole in memory."""
