"""The ground under every kernel: ops of torch, launches, workspaces, settings of this GPU."""
