"""A recording as one HTML page with a player, which needs no network and nothing beside itself."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

from vllm_twotower.watch.look import CLASSES, UNKNOWN, figures, printable, progress, title
from vllm_twotower.watch.recording import Cell, Frame, Recording, timeline


def page(recording: Recording, rival: Recording | None = None) -> str:
    """The page; ``rival`` is the same prompt token by token."""
    moments = timeline(recording, rival)
    places = {id(frame): i for i, frame in enumerate(recording.frames)}
    data = {
        "heading": recording.model + (", token by token" if recording.mode == "ar" else " fills its blocks"),
        "about": title(recording),
        "prompt": printable(recording.prompt, "\n"),
        "figures": [line.split(" ", 1) for line in figures(recording, len(recording.text), recording.passes)],
        "classes": CLASSES,
        "unknown": UNKNOWN,
        "text": [_cell(cell) for cell in recording.text],
        "frames": [_frame(frame) for frame in recording.frames],
        "moments": [
            [
                round(moment.seconds, 6),
                places[id(moment.frame)],
                moment.rival_tokens,
                progress(moment.frame),
                figures(recording, moment.frame.tokens, moment.frame.passes),
                figures(rival, moment.rival_tokens, moment.rival_tokens) if rival else [],
            ]
            for moment in moments
        ],
        "rival": rival and {"title": title(rival), "text": [_cell(cell) for cell in rival.text]},
        "order": _order(recording),
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # No text can end the script that it stands in.
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    # The data last: they may contain anything, the other placeholder too.
    return template.replace("__TITLE__", html.escape(title(recording))).replace("__DATA__", packed)


def _cell(cell: Cell) -> list[Any]:
    probabilities = (None if p is None else round(p, 6) for p in (cell.confidence, cell.runner_up))
    return [printable(cell.text, "\n"), cell.state, *probabilities, cell.decided_in, cell.block]


def _frame(frame: Frame) -> dict[str, Any]:
    cells = [_cell(cell) for cell in frame.cells]
    return {
        "tokens": frame.tokens,
        "block": frame.block,
        "number": frame.number,
        "verified": frame.verified,
        "cells": cells,
    }


def _order(recording: Recording) -> list[dict[str, Any]]:
    """The rows of the picture of the order: the decided canvas of every block, and its first frame."""
    rows = []
    for place, frame in enumerate(recording.frames):
        if frame.cells and frame.number == frame.of and not frame.verified:
            cells = [_cell(cell) for cell in frame.cells]
            verdict = recording.frames[place + 1]
            if verdict.verified:
                # Without the context tower's own token, which no pass of the denoiser decided.
                drafted = [cell for cell in verdict.cells if cell.decided_in is not None]
                cells = [_cell(cell) for cell in drafted]
            rows.append({"block": frame.block, "passes": frame.of, "first": place - frame.of, "cells": cells})
    return rows
