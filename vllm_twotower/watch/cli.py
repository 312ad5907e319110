"""``vllm-twotower watch``: a completion being made, pass by pass, in the terminal, on a page or as a moving picture."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from itertools import chain
from pathlib import Path

from vllm_twotower.models import embedded_model
from vllm_twotower.watch.look import figures, printable, shown_slower, title
from vllm_twotower.watch.page import page
from vllm_twotower.watch.picture import picture
from vllm_twotower.watch.recording import Moment, Recording, timeline
from vllm_twotower.watch.sources import TRACE, Chunks, ServerSource, Source, WatchError, ahead, offline_source
from vllm_twotower.watch.terminal import Screen, can_encode, hidden_cursor, is_plain, notice, plain_lines

PROMPT = "Question: Sam has 14 shells, buys 76 more and gives 28 to Noah. How many shells are left?\nAnswer:"
MODES = ("mask_diffusion", "verified", "ar")
WARM_UP_TOKENS = 40
EXIT_FAILED, EXIT_INTERRUPTED = 1, 128 + signal.SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] PROMPT",
        help="folder of a checkpoint (default: the embedded model), or with --server a served model's name; prompt",
    )
    parser.add_argument("--server", metavar="URL", help="ask a server, e.g. http://127.0.0.1:8000, and start no engine")
    parser.add_argument("--mode", choices=MODES, default="mask_diffusion", help="how (default: %(default)s)")
    parser.add_argument(
        "--race", action="store_true", help="below it the same prompt in mode ar, both at their true speed"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--confidence-threshold", type=float, metavar="P", help="default: the engine's")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s, greedy")
    parser.add_argument("--seed", type=int, help="of sampling, with a temperature")
    parser.add_argument(
        "--delay", type=float, metavar="SECONDS", help="for which a pass is shown (default: 0.15, over a pipe 0)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a player as well")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a moving picture as well")


def run(args: argparse.Namespace) -> None:
    """Runs the command, and exits with a message where it fails."""
    try:
        with ExitStack() as stack:
            # Ctrl-C ends the command as it does in a shell, also where it was started to ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            _watch(args, stack)
    except WatchError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def _fail(message: str) -> None:
    print(f"vllm-twotower watch: {message}", file=sys.stderr)
    sys.exit(EXIT_FAILED)


def _watch(args: argparse.Namespace, stack: ExitStack) -> None:
    model, prompt = _words(args)
    for path in filter(None, (args.html, args.svg)):
        if not path.parent.is_dir():
            raise WatchError(f"{path}: there is no folder {path.parent}")
    if args.race and args.mode == "ar":
        raise WatchError("--race is against mode ar: choose another --mode")
    plain = is_plain(sys.stdout)
    delay = (0.0 if plain else 0.15) if args.delay is None else args.delay
    source: Source
    if args.server:
        source = ServerSource(args.server, model)
    else:
        with _notice("The engine starts ...", plain):
            source = stack.enter_context(offline_source(Path(model or embedded_model())))
    rival = None
    with _notice("Generating ...", plain):
        recording, chunks = _request(source, prompt, args, args.mode)
        # A server's passes are shown as they come, while it goes on.
        moments = _moments(recording, ahead(chunks) if args.server else chunks)
        if args.race:
            rival, others = _request(source, prompt, args, "ar")
        if rival or not args.server:
            # One after the other, and before anything is drawn: what runs beside an engine slows it down.
            for _ in chain(moments, _moments(rival, others) if rival else ()):
                pass
            moments = (moment for moment in timeline(recording, rival))
    with closing(moments):
        (_show_plain if plain else _show)(recording, rival, moments, delay)
    for path, make in ((args.html, page), (args.svg, picture)):
        if path:
            try:
                path.write_text(make(recording, rival), encoding="utf-8")
            except OSError as error:
                raise WatchError(f"{path} cannot be written: {error.strerror}") from None


def _notice(text: str, plain: bool) -> AbstractContextManager[None]:
    return nullcontext() if plain else notice(sys.stdout, text)


def _words(args: argparse.Namespace) -> tuple[str | None, str]:
    """The model, if one is named, and the prompt."""
    match args.words:
        case []:
            return None, PROMPT
        case [word] if not args.server and Path(word).is_dir():
            return word, PROMPT
        case [word]:
            return None, word
        case [model, prompt]:
            return model, prompt
    raise WatchError("a model and a prompt are all that is expected; a prompt of several words needs quotes")


def _request(source: Source, prompt: str, args: argparse.Namespace, mode: str) -> tuple[Recording, Chunks]:
    """A recording that is empty, and the chunks for it."""
    options = {"diffusion_mode": mode, TRACE: "passes"}
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    settings = {}
    if args.confidence_threshold is not None and mode == args.mode:
        options["diffusion_confidence_threshold"] = args.confidence_threshold
        settings["threshold"] = args.confidence_threshold
    if args.temperature:
        settings["temperature"] = args.temperature
    if args.seed is not None:
        sampling["seed"] = args.seed
    if args.race or not args.server:
        # The first request pays for lazy initialisation.
        warm_up = sampling | {"max_tokens": min(args.max_tokens, WARM_UP_TOKENS)}
        for _ in source.chunks(prompt, options, **warm_up):
            pass
    return Recording(prompt, source.model, mode, source.decode, settings), source.chunks(prompt, options, **sampling)


def _moments(recording: Recording, chunks: Chunks) -> Generator[Moment, None, None]:
    """What is to be seen of a recording that grows."""
    with closing(chunks):
        for chunk in chunks:
            for frame in recording.add(chunk):
                yield Moment(frame.seconds, frame)
    if not recording.text:
        raise WatchError("no tokens came")
    [frame] = recording.finish()
    yield Moment(frame.seconds, frame)


def _show_plain(recording: Recording, rival: Recording | None, moments: Iterator[Moment], delay: float) -> None:
    unicode = can_encode(sys.stdout)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(f"{title(recording)}\n\n{printable(recording.prompt, chr(10))}\n", flush=True)
    shown = None
    for moment in moments:
        if moment.frame is not shown:
            for line in plain_lines(recording, moment, unicode):
                print(line, flush=True)
                time.sleep(delay)
        shown = moment.frame
    for whose in filter(None, (recording, rival)):
        print(f"\n{title(whose)}: {', '.join(figures(whose, len(whose.text), whose.passes))}")
        print(printable(whose.completion, "\n"))


def _show(recording: Recording, rival: Recording | None, moments: Iterator[Moment], delay: float) -> None:
    screen = Screen(sys.stdout)
    slower = 0.0
    if rival:
        every = [*moments]
        slower, moments = shown_slower(every, delay), iter(every)
    start = time.monotonic()
    with hidden_cursor(sys.stdout):
        moment = next(moments)
        for following in moments:
            screen.draw(recording, moment, rival)
            pause = start + following.seconds * slower - time.monotonic() if rival else delay
            time.sleep(max(pause, 0))
            moment = following
        screen.draw(recording, moment, rival, last=True)
