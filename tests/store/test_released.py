"""The authors' format from strangers: what would run code or fill the memory is refused before it does."""

import io
import zipfile

import pytest
import torch

from codebook.errors import CodebookError
from codebook.store.released import read_released


def saved(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def rewritten(data, change):
    """The same archive, written anew by `change(archive, name, contents)`."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))
    return out.getvalue()


def packed(data):
    return rewritten(data, lambda new, name, part: new.writestr(name, part, zipfile.ZIP_DEFLATED))


READABLE = torch.arange(12.0).reshape(4, 3).half()
WRONG = {
    "packed": (lambda: packed(saved(torch.zeros(4, 3).half())), "is packed"),
    "legacy": (lambda: saved(READABLE, _use_new_zipfile_serialization=False), "holds no tensor that can be read"),
    "strides of 0": (lambda: saved(torch.ones(1, 1).half().expand(10**6, 10**6)), "does not hold one tensor of floats"),
    "strides": (lambda: saved(torch.ones(4, 6).half()[:, ::2]), "does not hold one tensor of floats"),
    "no numbers": (lambda: saved(torch.ones(4, 3, device="meta")), "does not hold one tensor of floats"),
    "sparse": (lambda: saved(torch.eye(3).to_sparse()), "does not hold one tensor of floats"),
    "whole numbers": (lambda: saved(torch.ones(4, 3, dtype=torch.int8)), "does not hold one tensor of floats"),
    "one row": (lambda: saved(torch.ones(3)), "does not hold one tensor of floats"),
    "several": (lambda: saved([READABLE, READABLE]), "does not hold one tensor of floats"),
    "no archive": (lambda: b"not an archive", "holds no tensor that can be read"),
    "empty": (lambda: b"", "holds no tensor that can be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors(tmp_path, what):
    make, says = WRONG[what]
    (tmp_path / "t.pt").write_bytes(make())
    (tmp_path / "t.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(CodebookError, match=says):
        read_released(tmp_path / "t.pt", tmp_path / "t.json")


def test_parts_inside_each_other(tmp_path, monkeypatch):
    """Each part is within the file, and all of them together are larger than it."""
    data = saved(torch.zeros(64, 64).half())
    (tmp_path / "t.pt").write_bytes(data)
    (tmp_path / "t.json").write_text("[]")
    real = zipfile.ZipFile.infolist
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda self: real(self) * 3)
    with pytest.raises(CodebookError, match="is packed"):
        read_released(tmp_path / "t.pt", tmp_path / "t.json")


def test_a_good_one(tmp_path):
    (tmp_path / "t.pt").write_bytes(saved(torch.nn.Parameter(READABLE)))
    (tmp_path / "t.json").write_text('[1, "2", 3, 3]')
    prototypes, ids = read_released(tmp_path / "t.pt", tmp_path / "t.json")
    assert prototypes.dtype == torch.float32 and prototypes.equal(READABLE.float()) and not prototypes.requires_grad
    assert ids == ["1", "2", "3", "3"]
