"""Equal tensors and headers give equal bytes, and read back as they were."""

import pytest
import torch
from safetensors import safe_open

from ptq4dm.errors import UserError
from ptq4dm.files.tensors import write_tensors

HEADER = {
    "progress": '{"step": 1}',
    "recipe": 'über\n\t\u0001"quoted" \\ / \u007f',
    "checks": "{}",
    "a": "",
    "z": "1",
}


def test_equal_contents_are_equal_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor([True]), "é": torch.zeros(0)}
    written = set()
    for k in range(12):  # a hash map has four texts in one of 24 orders
        write_tensors(tmp_path / str(k), tensors, HEADER)
        written.add((tmp_path / str(k)).read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == HEADER
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="missing"):
        write_tensors(tmp_path / "missing" / "file", {"a": torch.ones(1)})
