"""Log-probabilities of prompts, kept until their request returns something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput


class HeldPromptScores:
    """vLLM sends a prompt's log-probabilities with the first token, which a block's request has in a later step."""

    def __init__(self) -> None:
        self._held: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    def __len__(self) -> int:
        return sum(map(len, self._held))

    def exchange(
        self, output: ModelRunnerOutput, num_sampled: Mapping[str, int], is_waiting: Callable[[str], bool]
    ) -> None:
        """Takes from a step's output what vLLM could not send yet, and puts back what goes with a first token."""
        returned_by_kind = output.prompt_logprobs_dict, output.prompt_token_id_logprobs_dict
        for held, returned in zip(self._held, returned_by_kind, strict=True):
            for req_id, count in num_sampled.items():
                if not is_waiting(req_id):
                    continue
                if count and req_id in held:
                    returned[req_id] = held.pop(req_id)
                elif not count and req_id in returned:
                    held[req_id] = returned.pop(req_id)

    def drop(self, req_id: str) -> None:
        """Forgets those of a request that ended."""
        for held in self._held:
            held.pop(req_id, None)
