"""What a model's output holds beside its prediction."""

from __future__ import annotations

import torch

from ...errors import UserError


def without_variance(model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The prediction [B, C, ...], of the sample's shape; of an output [B, 2 C, ...] the first half of the channels.

    Models that learn a variance (variance_type "learned" or "learned_range") put it behind the prediction; these
    samplers add no noise of it. The result is a view.

    Raises:
        UserError: any other shape.
    """
    if model_output.shape == sample.shape:
        return model_output
    if sample.ndim > 1 and model_output.shape == (len(sample), 2 * sample.shape[1], *sample.shape[2:]):
        return model_output[:, : sample.shape[1]]
    raise UserError(
        f"the model's output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}; they must "
        "agree, or the output have twice the channels (a learned variance behind the prediction)."
    )


def noise_in(output: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float, prediction_type: str) -> torch.Tensor:
    """epsilon, from what a model predicts of x = alpha x_0 + sigma epsilon; all of one shape."""
    if prediction_type == "v_prediction":
        return alpha * output + sigma * x
    if prediction_type == "sample":
        return (x - alpha * output) / sigma
    if prediction_type == "flow_prediction":
        return x + alpha * output  # alpha + sigma = 1
    return output
