"""A soak: random requests of all kinds to a small server under pressure, and every answer compared with the same alone.

More clients than seats, fewer pages than the seats need, prompts that share beginnings, bad requests, clients that
leave. Then every request that was answered is asked again of a server that runs one at a time, without a prefix cache.
What must hold is in docs/reliability.md; the exit status is 1 if something does not. It goes on where it was
interrupted:

    python benchmarks/soak.py --requests 10000

One request of a soak, with nothing beside it, and its answers from both servers:

    python benchmarks/soak.py --only 123
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))  # the servers, the requests and the plain model's answers

import conftest  # noqa: E402, F401  one thread
import golden_data  # noqa: E402
import soaking  # noqa: E402
from serving import running_server  # noqa: E402
from soak_answers import RoundingJudge  # noqa: E402
from soak_requests import draw_asked  # noqa: E402
from vllm.tokenizers import get_tokenizer  # noqa: E402

from vllm_twotower.reference import TwoTowerModel  # noqa: E402

CHECKPOINT = golden_data.checkpoint("A")
MEMORY_GROWTH = 0.03
"""The most that a process's resident memory may grow from the second tenth of the requests to the last."""


def main() -> None:
    """Runs a soak, or what is left of it, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=24, help="clients under load")
    parser.add_argument("--servers-alone", type=int, default=2, help="servers of the second part, a core each")
    parser.add_argument("--only", type=int, metavar="INDEX", help="one request instead, which is printed")
    parser.add_argument("--server", action="append", default=[], metavar="OPTION", help="of `vllm serve` under load")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "soak", help="folder of logs and results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server stays

    indices, results = range(args.requests), args.output / "results.jsonl"
    if args.only is not None:
        indices, results = [args.only], args.output / f"only-{args.only}.jsonl"
        results.unlink(missing_ok=True)
    under_load = [*soaking.UNDER_LOAD, *args.server]
    try:
        journal = soaking.Journal(results, {"seed": args.seed, "server": under_load})
    except ValueError as error:
        sys.exit(f"{error}; delete it or choose another --output")

    log = args.output / "load.log"
    if not journal.asked().issuperset(indices):
        with running_server(CHECKPOINT, log, *under_load, environment=soaking.ENVIRONMENT) as server:
            with soaking.faults_of(server) as faults:
                asyncio.run(soaking.load(server, args.seed, indices, journal, args.at_once))
            journal.add("faults", faults=faults)
    with ExitStack() as stack:
        logs = [args.output / f"alone-{i}.log" for i in range(args.servers_alone)]
        servers = [stack.enter_context(running_server(CHECKPOINT, log, *soaking.ALONE)) for log in logs]
        asyncio.run(soaking.compare_alone(servers, args.seed, indices, journal, at_once=3))

    judge = RoundingJudge(TwoTowerModel.from_pretrained(CHECKPOINT), get_tokenizer(CHECKPOINT))
    summary = soaking.summarize(args.seed, indices, journal, judge)
    if args.only is None:
        add_faults_of_the_whole(summary)
        (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    else:
        print(json.dumps(draw_asked(args.seed, args.only).body))
        print("under load:", json.dumps(journal.outcome(args.only)))
        print("alone:", json.dumps(journal.compared.get(args.only)))
    print_table(summary)
    if summary["faults"]:
        sys.exit(1)


def add_faults_of_the_whole(summary: dict) -> None:
    """Notes what must happen in a soak and did not, and memory that grew."""
    faults = summary["faults"]
    faults += [f"no {name}" for name in soaking.MUST_HAPPEN if not summary[name]]
    for process, (early, late) in summary["memory"].items():
        if late > early * (1 + MEMORY_GROWTH):
            faults.append(f"memory of the {process} grew from {early:.1f} to {late:.1f} MiB")


def print_table(summary: dict) -> None:
    """Prints a summary as one table, then what is wrong."""
    rows = {name: value for name, value in summary.items() if name not in ("memory", "faults")}
    for process, (early, late) in summary["memory"].items():
        rows[f"MiB of the {process}, second tenth and last"] = f"{early:.1f}, {late:.1f} ({late / early - 1:+.1%})"
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.1e} |" if isinstance(value, float) else f"| {name} | {value} |")
    print(*summary["faults"] or ["all as it should be"], sep="\n")


if __name__ == "__main__":
    main()
