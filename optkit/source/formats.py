"""What a file is, decided by its content and not by its name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from optkit.errors import CheckpointError
from optkit.source.reading import damaged

_READS = (
    "a torch.export .pt2, a state_dict (torch.save or safetensors) with a factory, TorchScript, ONNX, "
    "or a Hugging Face model folder"
)


_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file itself: run `git lfs pull`",
    b"\x89HDF": "HDF5, as Keras writes it",
    b"GGUF": "GGUF, quantized weights for llama.cpp",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"<": "HTML or XML, perhaps the error page of a download",
}


def recognise(path: Path) -> str:
    """What a file or folder is, by its content: the name of one of the readers.

    Raises:
        CheckpointError: there is nothing, or nothing that optkit reads.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return "huggingface"
        raise CheckpointError(f"{path}: a folder without config.json is no Hugging Face model; name the file in it")
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file or folder (optkit reads local files only)") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty; save or download the checkpoint again")
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, 100_000_000):
        return "safetensors"
    if head[0] == 0x80:
        return "torch.save"
    if head[0] == 0x08 and len(head) > 1 and head[1] < 64:  # Field 1 of a ModelProto, the IR version
        return "onnx"
    known = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), "nothing known")
    raise CheckpointError(f"{path}: starts with {head[:8]!r}, which is {known}; optkit reads {_READS}")


def _recognise_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise damaged(path, "a zip archive without its end") from error
    members = {name.partition("/")[2] for name in names}
    if len({name.partition("/")[0] for name in names}) == 1 and len(set(names)) == len(names):
        if any(member.startswith("data/aotinductor/") for member in members):
            raise CheckpointError(f"{path}: compiled by AOTInductor; give the .pt2 that torch.export.save wrote")
        if any(member.startswith("models/") for member in members):
            return "torch.export"
        if "constants.pkl" in members:
            return "torchscript"
        if "data.pkl" in members:
            return "torch.save"
    if "serialized_exported_program.json" in names:
        raise CheckpointError(f"{path}: a .pt2 of torch 2.7 or older; write it again with a newer torch.export.save")
    raise CheckpointError(
        f"{path}: a zip archive with {', '.join(names[:3]) or 'nothing'} in it; optkit reads {_READS}"
    )
