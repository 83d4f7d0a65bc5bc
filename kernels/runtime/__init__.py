"""What every kernel needs: ops of torch, launches, workspaces, settings of this GPU."""
