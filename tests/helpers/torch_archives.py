"""Archives as `torch.save` writes them, made without torch."""

import zipfile
from pathlib import Path


def write_torch_archive(file: Path, program: bytes, **members: bytes) -> Path:
    """Write an archive with a pickle and other members, `_` in their names standing for `/`."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)
    return file
