"""The search for the settings that run fastest on a GPU, behind `ptq4dm bench tune`."""
