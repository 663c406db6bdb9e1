"""evaluation.json: figures beside the protocol that they stand for, and tables made from them."""

import json
import os
from pathlib import Path

from base.errors import UserError
from base.files import ASSETS, write_json

COLUMNS = {"digits-FID": "{:.3f}", "emoji-FID": "{:.3f}", "FID": "{:.3f}",
           "right_class": "{:.2%}", "right_picture": "{:.2%}", "patch_fid": "{:.3f}",
           "clip_score": "{:.4f}", "diversity": "{:.4f}", "inception_score": "{:.3f}",
           "precision": "{:.4f}", "recall": "{:.4f}"}
HEADINGS = {"right_class": "right class", "right_picture": "right picture",
            "patch_fid": "patch FID", "clip_score": "CLIP score",
            "inception_score": "Inception score"}


def identity(entry):
    """What a new evaluation replaces: the same thing by the same protocol, whatever its weights."""
    protocol = {"resize": "tf1"}                # what records that say nothing of it stand for
    protocol |= {k: v for k, v in entry["protocol"].items() if k != "source"}
    source = entry["protocol"]["source"]
    return json.dumps([entry["what"], source["file"], source.get("base"), protocol],
                      sort_keys=True)


def read_records(path):
    """The entries of an evaluation.json."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or content["format"] != 1:
            raise ValueError
        for entry in content["evaluations"]:        # these two read every field that is used
            identity(entry)
            table([entry])
        return content["evaluations"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no record of evaluate.py") from None


def out_path(out, source, ours, force):
    """Where a record is written: beside a checkpoint of a run, else in the current folder."""
    beside = ours and source.parent.resolve() != ASSETS
    path = Path(out or (source.parent if beside else Path()) / "evaluation.json")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a .json file")
    if path.exists() and not force:
        try:
            read_records(path)
        except UserError as error:
            raise UserError(f"{error}; --force replaces it, --out names another file") from None
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path}: cannot write to {path.parent}")
    return path


def record(path, new, force):
    """Add the new entries to the file; those of the same identity go. With force it may be any."""
    try:
        old = read_records(path) if path.exists() else []
    except UserError:
        if not force:
            raise
        old = []
    fresh = {identity(entry) for entry in new}
    kept = [entry for entry in old if identity(entry) not in fresh]
    write_json(path, {"format": 1, "evaluations": kept + new})


def table(records):
    """Markdown: a row for each record, a column for each figure that any has, protocols below."""
    names = [name for name in COLUMNS if any(name in r["figures"] for r in records)]
    repeated = any(len(f["values"]) > 1 for r in records for f in r["figures"].values())
    lines = ["| | evaluations | " + " | ".join(HEADINGS.get(n, n) for n in names) + " | protocol |",
             "|---|---|" + "---|" * (len(names) + 1)]
    protocols = []
    for r in records:
        text = protocol_text(r)
        protocols += [text] if text not in protocols else []
        cells = [cell(r["figures"].get(name), COLUMNS[name]) for name in names]
        cells = [f"{r['protocol']['source']['file']}, {r['what']}", str(r["evaluations"] or "-"),
                 *cells, str(protocols.index(text) + 1)]
        lines.append(f"| {' | '.join(cells)} |")
    if repeated:
        lines += ["", "Mean over blocks of seeds (least to most)."]
    lines += [""] + [f"Protocol {k}: {text}." for k, text in enumerate(protocols, 1)]
    return "\n".join(lines)


def cell(figure, form):
    if figure is None:
        return "-"
    least, most = figure["least"], figure["least"] + figure["spread"]
    span = f" ({form.format(least)} to {form.format(most)})" if len(figure["values"]) > 1 else ""
    return form.format(figure["mean"]) + span


def protocol_text(r):
    p, e = r["protocol"], r["environment"]
    clip = p.get("clip_score")
    base = p["source"].get("base")
    parts = [f"{p['images']:,} images", f"seeds {', '.join(p['seeds'])}" if p["seeds"] else "",
             f"pipeline {base}" if base else "",
             f"labels: {p['labels']}", prompts_text(p["prompts"]) if "prompts" in p else "",
             f"guidance {p['guidance']:g}" if "guidance" in p else "",
             p["rounding"], p.get("precision", ""),
             f"middle squares, Lanczos to {p['side']}" if "side" in p else "",
             "clean-fid's resize" if p.get("resize") == "clean" else "",
             f"reference {p['reference']['file']} ({p['reference']['sha256'][:8]})",
             f"features {p['features']['network']} ({(p['features']['sha256'] or '-')[:8]})",
             f"CLIP score of {clip['model']} ({clip['sha256'][:8]})" if clip else "",
             "patch FID of the middle 299 pixels a side, reference "
             f"{p['patch_reference']['file']} ({p['patch_reference']['sha256'][:8]})"
             if "patch_reference" in p else "",
             p.get("diversity", ""), p.get("precision_recall", ""),
             f"torch {e['torch']}, {e['device']}"]
    return "; ".join(part for part in parts if part)


def prompts_text(prompts):
    text = f"prompts {prompts['file']} ({prompts['sha256'][:8]})"
    return f"{text}, {prompts['choice']}" if "choice" in prompts else text


def records_under(paths):
    """The entries of files, and of every evaluation*.json under folders."""
    found = []
    for path in map(Path, paths):
        files = sorted(path.rglob("evaluation*.json")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"--table {path}: no evaluation.json under it")
        for file in files:
            found += read_records(file)
    return found
