"""Denoisers served by OpenVINO on a CPU, with the codes, scales and ranges that the layers have."""
