"""Few-step samplers (planned): DDIM, DEIS, DisBack."""
