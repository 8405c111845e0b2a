"""Which class a picture is of: by its name, by its folder, or by a file that tells; and the numbers of the classes."""

import csv
import io
import json
import unicodedata
import warnings

import numpy as np

LABEL_FILES = {"csv": "labels.csv", "json": "dataset.json"}
LABEL_RULES = ("auto", "prefix", "folder", *LABEL_FILES)
_HEADER = {"file", "filename", "file_name", "name", "image", "path"}


def check_rule(label_from):
    """Raise ValueError unless this is one of LABEL_RULES."""
    if label_from not in LABEL_RULES:
        raise ValueError(f"label_from is {label_from!r}; choose one of {', '.join(LABEL_RULES)}")


def label(names, files, where, label_from, class_names=None):
    """
    The label of each picture: (int64 [N], class names by label, the rule in words). Where labels.csv holds whole
    numbers alone, these are the labels, unless the earlier run knew them as names.

    :param names: of the pictures, relative to the data, with / between folders.
    :param files: {name: content} of those LABEL_FILES that lie beside them.
    :param where: the data's path, for messages.
    :param label_from: one of LABEL_RULES; "auto" takes labels.csv or dataset.json where there is one, else prefixes or
        folders.
    :param class_names: the names by label, as an earlier run knew them, or None: those found, sorted as text.
    :raises ValueError: if pictures have no label, or one that does not fit.
    """
    told = _told_by_file(files, where, label_from)
    if told is None:
        values, rule = _class_name_of_each(names, where, label_from)
        return *_numbered(values, class_names, where, rule), rule
    table, own, rule = told
    values = _look_up(names, table, f"{where}/{rule}")
    if all(map(_is_number, values)) and not set(values) <= set(class_names or ()):
        return *renumbered(np.array(list(map(int, values)), dtype=np.int64), own, class_names, where), rule
    return *_numbered(values, class_names, where, rule), rule


def renumbered(labels, own, known, where):
    """
    (labels, class names): where data name their classes (`own`) and so does an earlier run (`known`), by the numbers of
    that run; else unchanged, with the names that there are, or None.

    :raises ValueError: for a class that the run does not know, or a label without a name.
    """
    if own is None or known is None or list(own) == list(known):
        names = known if own is None else own
        return labels, None if names is None else list(names)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(own):
        raise ValueError(f"{where} names {len(own)} classes and has labels from {labels.min()} to {labels.max()}")
    return _numbered([own[value] for value in labels], known, where, "its class names")


def warn_of_gaps(labels, class_names, rule):
    """Warn of what makes labels useless or waste classes: one class only; numbers that name no image."""
    present = np.unique(labels)
    if len(present) == 1:
        name = f" ({class_names[present[0]]!r})" if class_names and 0 <= present[0] < len(class_names) else ""
        warnings.warn(f"all {len(labels)} images are of one class, {present[0]}{name} (labels by {rule})", stacklevel=2)
    absent = np.setdiff1d(np.arange(min(present[-1] + 1, 10**6)), present)
    if len(absent):
        shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warnings.warn(f"no image has label {shown}, of labels up to {present[-1]} (labels by {rule})", stacklevel=2)


def shorten(names, most=10):
    """The names, sorted, as a text with commas; no more than so many."""
    names = sorted(set(names))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _numbered(values, class_names, where, rule):
    """(labels int64 [N], class names) of a class name for each picture."""
    class_names = sorted(set(values)) if class_names is None else list(class_names)
    label_of = {_plain(name): number for number, name in enumerate(class_names)}
    label_of |= {name: number for number, name in enumerate(class_names)}
    numbers = [label_of.get(value, label_of.get(_plain(value))) for value in values]
    unknown = sorted({value for value, number in zip(values, numbers) if number is None})
    if unknown:
        raise ValueError(
            f"{where} holds class {unknown[0]!r}, which is not one of the {len(class_names)} known classes: "
            f"{shorten(class_names)} (labels by {rule})"
        )
    return np.array(numbers, dtype=np.int64), class_names


def _is_number(value):
    """Whether this is a whole number, or a text that writes one as is usual, 7 and not 07."""
    return isinstance(value, int) or (value.isascii() and value.isdecimal() and value == str(int(value)))


def _plain(text):
    """One spelling of letters that have several: systems differ in how they write accents in names of files."""
    return unicodedata.normalize("NFC", text)


# ------------------------------------------------------------------------------------------------- by a file of labels


def _told_by_file(files, where, label_from):
    """({picture: class name or number}, class names or None, name of the file), or None if names are to tell."""
    if label_from in ("prefix", "folder"):
        return None
    if label_from == "auto":
        found = [rule for rule, name in LABEL_FILES.items() if name in files]
        if len(found) > 1:
            raise ValueError(f"{where} holds both {' and '.join(LABEL_FILES.values())}: choose by --label_from")
        return _told_by_file(files, where, found[0]) if found else None
    name = LABEL_FILES[label_from]
    if name not in files:
        raise ValueError(f"label_from is {label_from}, but there is no {name} in {where}")
    try:
        text = files[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}/{name} is no text in UTF-8: {error}") from None
    table, own = _read_csv(text, f"{where}/{name}") if label_from == "csv" else _read_json(text, f"{where}/{name}")
    return table, own, name


def _read_csv(text, path):
    """Lines FILE,LABEL, the first may be a header."""
    rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text)), 1) if any(map(str.strip, row))]
    if rows and rows[0][1][0].strip().lower() in _HEADER:
        del rows[0]
    table = {}
    for number, row in rows:
        if len(row) != 2 or not row[1].strip():
            raise ValueError(f"{path}, line {number}: {','.join(row)!r} is not FILE,LABEL")
        _add(table, row[0].strip(), row[1].strip(), f"{path}, line {number}")
    return table, None


def _read_json(text, path):
    """StyleGAN's {"labels": [[FILE, LABEL], ...]}, or null for none; and, if there, "class_names": [NAME, ...]."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no whole json: {error}") from None
    rows = content.get("labels") if isinstance(content, dict) else [content]
    names = content.get("class_names") if isinstance(content, dict) else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: class_names is no list of texts")
    if rows is None:
        raise ValueError(f"{path} says that there are no labels; --label_from prefix or folder takes the names")
    table = {}
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str) or type(row[1]) is not int:
            raise ValueError(f'{path}: {str(row)[:60]} is no [FILE, NUMBER] of {{"labels": [[FILE, NUMBER], ...]}}')
        _add(table, row[0].replace("\\", "/"), row[1], path)
    return table, names


def _add(table, name, value, where):
    name = _plain(name.removeprefix("./"))
    if table.setdefault(name, value) != value:
        raise ValueError(f"{where}: {name} has two labels, {table[name]!r} and {value!r}")


def _look_up(names, table, path):
    """The value of each picture. A row without a picture is worth a warning only: bad pictures get deleted."""
    values = [table.get(_plain(name)) for name in names]
    unlabelled = [name for name, value in zip(names, values) if value is None]
    if unlabelled:
        raise ValueError(
            f"{path} has no label for {unlabelled[0]} ({len(unlabelled)} of {len(names)} pictures): add it, or let"
            " names tell, by --label_from prefix or folder"
        )
    left = sorted(table.keys() - {_plain(name) for name in names})
    if left:
        warnings.warn(f"{path} names {len(left)} files that are not there, as {left[0]}; passed over", stacklevel=2)
    return values


# --------------------------------------------------------------------------------------------------- by names of files


def _class_name_of_each(names, where, label_from):
    """The class name of each file and, in words, the rule that gave it."""
    inside = [name.split("/") for name in names]
    prefixes = [parts[-1].split("_")[0] for parts in inside]
    folders = [parts[0] for parts in inside if len(parts) > 1]
    bare = next((name for name, parts in zip(names, inside) if "_" not in parts[-1]), None)
    loose = next((name for name, parts in zip(names, inside) if len(parts) == 1), None)
    if label_from == "auto":
        if bare is None and (len(set(prefixes)) > 1 or not folders):
            label_from = "prefix"
            _warn_if_folders_differ(prefixes, folders)
        elif loose is None:
            label_from = "folder"
        else:
            raise ValueError(
                f"no class labels in {where}: name the files CLASS_anything.EXT, put them into one folder a class, or "
                f"write them into labels.csv ({bare or loose} fits neither)"
            )
    if label_from == "prefix":
        if bare is not None:
            raise ValueError(f"label_from is prefix, but {bare} has no '_' in its name; rename it or use folder")
        return prefixes, "file-name prefix"
    if loose is not None:
        raise ValueError(f"label_from is folder, but {loose} lies in no sub-folder; move it into one or use prefix")
    return folders, "sub-folder"


def _warn_if_folders_differ(prefixes, folders):
    if len(folders) == len(prefixes) and len(set(folders)) > 1:
        by_prefix, by_folder, by_both = len(set(prefixes)), len(set(folders)), len(set(zip(prefixes, folders)))
        if not by_prefix == by_folder == by_both:
            warnings.warn(
                f"labels come from the {by_prefix} file-name prefixes ({shorten(prefixes)}), not from the {by_folder} "
                f"sub-folders ({shorten(folders)}); label_from=folder takes those",
                stacklevel=2,
            )
