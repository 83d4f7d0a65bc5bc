"""Arrays of others: a look at the sizes first, nothing unpickled."""

import io
import zipfile

import numpy as np
import pytest

from ptq4dm.errors import DamagedFile
from ptq4dm.evaluation.frechet import read_statistics
from ptq4dm.files.arrays import read_arrays


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape, descr="<f8"):
    """The first bytes of an array that says it is of this shape, and has no values."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def write(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


def test_arrays_and_their_shapes(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", a=np.arange(6).reshape(2, 3), b=np.array("text"))
        found = read_arrays(tmp_path / "a.npz", lambda f: (f.names, f.shape("a"), f.array("a"), f.array("b")))
        assert found[:2] == (["a", "b"], (2, 3)) and found[3] == "text"
        np.testing.assert_array_equal(found[2], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (header((4, 4)), "which cannot be"),
        (header((4, 4), "<f8") + bytes(8), "which cannot be"),
        (header((4, 4), "|O") + bytes(128), "Python objects"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': 'x'    \n", "."),
        (b"junk", "magic"),
        (b"", "."),
    ],
)
def test_headers_that_lie(tmp_path, sigma, message):
    write(tmp_path / "a.npz", mu=npy(np.zeros(4)), sigma=sigma)
    with pytest.raises(DamagedFile, match=f"a.npz cannot be read .*{message}"):
        read_statistics(tmp_path / "a.npz")


def test_sizes_that_no_statistics_have(tmp_path):
    d = 10**6
    write(tmp_path / "a.npz", mu=header((d,)) + bytes(8), sigma=header((d, d)) + bytes(8))
    with pytest.raises(DamagedFile, match="which cannot be"):
        read_statistics(tmp_path / "a.npz")


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path):
    d = 16384  # a covariance of 2 GB, in 2 MB
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mu.npy", npy(np.zeros(d)))
        with file.open("sigma.npy", "w", force_zip64=True) as member:
            member.write(header((d, d), "|u1"))
            for _ in range(d // 1024):
                member.write(bytes(d * 1024))
    read_arrays(tmp_path / "a.npz", lambda f: f.shape("sigma"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mu.npy", npy(np.zeros(d)))
        file.writestr("sigma.npy", header((d, d)))
        file.infolist()[1].file_size = 1 << 40  # what the directory says, too
    with pytest.raises(DamagedFile, match="which cannot be|cannot be read"):
        read_statistics(tmp_path / "b.npz")


def test_every_byte(tmp_path):
    np.savez(tmp_path / "good.npz", mu=np.zeros(1), sigma=np.ones((1, 1)))
    good, told = (tmp_path / "good.npz").read_bytes(), 0
    for place in range(len(good)):
        for data in (good[:place], good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :]):
            (tmp_path / "bad.npz").write_bytes(data)
            try:
                read_statistics(tmp_path / "bad.npz")
            except ValueError as error:
                told += 1
                assert "bad.npz" in str(error) and "\n" not in str(error), error
    assert told > len(good)
