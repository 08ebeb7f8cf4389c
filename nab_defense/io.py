"""The only file that knows disk formats: npz, JSON, CSV, safetensors, YAML; atomic writes; nothing is unpickled."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import Tensor

from . import ranks

__all__ = [
    "cache_folder", "check_folder", "file_hash", "load_array", "load_arrays", "load_csv", "load_json",
    "load_state", "load_tensors", "load_weights", "load_yaml", "save_array", "save_arrays", "save_csv", "save_image",
    "save_json", "save_state", "save_tensors", "save_text", "save_yaml",
]  # fmt: skip

log = logging.getLogger(__name__)


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that readers see the old one or the new one, never half of it; of several ranks one does, and all wait."""
    if ranks.leads():
        _replace(path, write)
    ranks.wait()


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, or that cannot be written to.

    Raises:
        ValueError: Names what is in the way."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {folder}: {there} is a file; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: no permission to write in {there}; name another folder")


def cache_folder(name: str) -> Path:
    """A folder for what can be made again, below NAB_CACHE or ~/.cache/nab_defense; created. It may be deleted at any time.

    Raises:
        ValueError: It cannot be written to."""
    folder = Path(os.environ.get("NAB_CACHE") or "~/.cache/nab_defense").expanduser() / name
    try:
        check_folder(folder)
    except ValueError as error:
        raise ValueError(f"{error}, by NAB_CACHE") from None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, as sha256sum gives it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before a CSV file
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, expected a file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from None


def save_text(path: Path, text: str) -> None:
    _write(path, lambda stream: stream.write(text.encode()))


def save_image(path: Path, image: Image.Image) -> None:
    _write(path, lambda stream: image.save(stream, "png"))


def save_json(path: Path, value: Any) -> None:
    save_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def load_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def save_yaml(path: Path, value: Any) -> None:
    save_text(path, yaml.safe_dump(value, sort_keys=False))


def load_yaml(path: Path) -> Any:
    text = _read_text(path)
    try:
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), str(path), set())
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _check_keys(node: Any, origin: str, seen: set[int]) -> None:
    """Refuse a key that is there twice, of which YAML keeps the last. `seen`: nodes by id, as an alias may lead back."""
    lines: dict[str, int] = {}
    for part in node.value if isinstance(node, yaml.CollectionNode) and id(node) not in seen else ():
        seen.add(id(node))
        if isinstance(part, tuple):
            key, part = part
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{origin} has {name!r} twice, in lines {lines[name]} and {line}; make them one")
            lines[name] = line
        _check_keys(part, origin, seen)


def save_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    _write(path, lambda stream: stream.write(text.getvalue().encode("utf-8", "backslashreplace")))


def load_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV file that has at least these columns."""
    reader = csv.DictReader(StringIO(_read_text(path), newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV, line {reader.line_num}: {error}") from None
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has: {', '.join(reader.fieldnames or [])}")
    return rows


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Any = None) -> None:
    """Numpy arrays and a JSON-able value in one npz file."""
    packed: dict[str, Any] = dict(arrays, meta=np.array(json.dumps(meta)))
    _write(path, lambda stream: np.savez(stream, **packed))


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a zip file of something else")
        return arrays, json.loads(str(arrays.pop("meta", "null")))
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except Exception as error:
        raise ValueError(f"{path} is not an npz file of this package: {error}") from None


def save_array(path: Path, array: np.ndarray) -> None:
    """One large array as .npy, which load_array maps."""
    _write(path, lambda stream: np.save(stream, array, allow_pickle=False))


def load_array(path: Path) -> np.ndarray:
    """A memory-mapped array, to be read only: what is not looked at is not read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except Exception as error:
        raise ValueError(f"{path} is not an npy file of this package: {error}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Tensors and JSON-able values in one safetensors file."""
    # cloned, as safetensors refuses tied weights, which share their memory
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {name: json.dumps(value) for name, value in meta.items()}
    payload = safetensors.torch.save(plain, metadata=header)
    _write(path, lambda stream: stream.write(payload))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            header = archive.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    return tensors, {name: _parsed(value) for name, value in header.items()}


def _parsed(text: str) -> Any:
    """A value of ours; the text itself where another program wrote it ("pt", in most files)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


_SCALAR = np.float64(0).__reduce__()[0]  # makes a number of its type and bytes, and refuses objects
_ARRAY = np.empty(0).__reduce__()[0]
# What programs keep beside the weights: arguments, and numpy's numbers, alone and in arrays. Read so they can do nothing.
BESIDE: list[Any] = [
    (SimpleNamespace, "argparse.Namespace"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (codecs.encode, "_codecs.encode"),
    np.ndarray,
    *(np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}),
]
# Averaged weights first, as timm's own loader has it: these are what is deployed.
AVERAGED = ("state_dict_ema", "model_ema", "ema")
STATE_KEYS = (*AVERAGED, "state_dict", "net", "model", "model_state_dict", "weights")


def load_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """A network's weights from a file of any program: safetensors, or what torch.save wrote.

    Returns: the tensors, and the key they were found under, "" at the top.

    Raises:
        ValueError: No such file, no weights in it, or objects that only an unpickler could make."""
    if path.suffix == ".safetensors":
        return load_tensors(path)[0], ""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with torch.serialization.safe_globals(BESIDE):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tar errors, by the file's age
        found = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        reason = f"it holds {found[1]}, and only tensors are read" if found else "it is broken, or of another kind"
        raise ValueError(f"{path} cannot be read as weights: {reason}; save model.state_dict() alone") from None
    for key in ("", *STATE_KEYS):
        state = tree if key == "" else tree.get(key) if isinstance(tree, Mapping) else None
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            if key in AVERAGED:
                log.warning("%s: the averaged weights, %r, are taken; leave these out of the file for the others", path, key)
            return dict(state), key
    held = ", ".join(map(str, list(tree)[:5])) if isinstance(tree, Mapping) else type(tree).__name__
    raise ValueError(f"{path} holds no state dict ({held}); expected tensors by name, bare or under {', '.join(STATE_KEYS)}")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """A training state (tensors, numbers, strings, lists, dicts) for --resume."""
    _write(path, lambda stream: torch.save(dict(state), stream))


def load_state(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except Exception as error:
        raise ValueError(f"{path} is not a training state of this package: {' '.join(str(error).split())[:200]}") from None
