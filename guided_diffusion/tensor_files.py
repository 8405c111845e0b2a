"""
The safetensors format, read and written: a header of json that names each tensor's type, shape and place, and then
their bytes. Nothing in such a file can run, and a header tells all without the bytes being read.

Layout (https://github.com/huggingface/safetensors): 8 bytes, the header's length in little endian; the header,
{name: {dtype, shape, data_offsets}}, with texts of the writer's own under "__metadata__"; the bytes, without gaps.
"""

import json
import math

import torch

LONGEST_HEADER = 100_000_000  # bytes, as in the format's own library
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}


def write(file, tensors, texts):
    """
    Write {name: tensor} and {name: text} to a binary file.

    :raises ValueError: for a tensor of a type that the format does not have.
    """
    header, offset = {"__metadata__": texts}, 0
    # Larger numbers first, so that each tensor's bytes lie where its type wants them.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors files do not hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def read_texts(file, path):
    """{name: text} that the writer put in. `path` names the file in errors. Raises ValueError as `read`."""
    return _header(file, path)[1]


def read(file, path, map_location="cpu"):
    """
    {name: tensor} of a binary file.

    :param path: what to call it in errors.
    :param map_location: device; on "meta" no bytes are read.
    :raises ValueError: if it is no such file, or not whole.
    """
    places, _ = _header(file, path)
    found, expected = {}, 0
    for name, (dtype, shape, start, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        if start != expected or end - start != size:
            raise ValueError(f"{path} is damaged: {name} of shape {list(shape)} has the bytes {start} to {end}")
        expected = end
        if torch.device(map_location).type == "meta":
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
            continue
        data = bytearray(file.read(size))
        if len(data) != size:
            raise ValueError(f"{path} is not whole: it ends within {name}")
        flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        found[name] = flat.reshape(shape).to(map_location)
    return found


def _header(file, path):
    """({name: (dtype, shape, start, end)}, {name: text})."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if 2 <= length <= LONGEST_HEADER else b""
    try:
        content = json.loads(text) if len(text) == length else None
        texts = content.pop("__metadata__", {})
        places = {name: _place(**place) for name, place in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file, or an incomplete one (its header cannot be read)") from error
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise ValueError(f"{path} is no safetensors file: its metadata are no texts")
    return places, texts


def _place(dtype, shape, data_offsets):
    start, end = data_offsets
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError("sizes must be whole numbers")
    return TYPES[dtype], tuple(shape), start, end
