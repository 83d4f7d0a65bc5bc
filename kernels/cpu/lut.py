NAME = "cpu-lut"


def serves(device):
    return False


linear = None
