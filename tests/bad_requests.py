"""What a request to a server of checkpoint A must be refused for, and the words of the refusal."""

from __future__ import annotations

from typing import Any

SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}

BAD_OPTIONS: list[tuple[str, Any]] = [
    ("diffusion_confidence_threshold", 0),
    ("diffusion_confidence_threshold", -0.5),
    ("diffusion_confidence_threshold", 1.5),
    ("diffusion_confidence_threshold", "x"),
    ("diffusion_canvas_length", 0),
    ("diffusion_canvas_length", 17),
    ("diffusion_canvas_length", 1.5),
    ("diffusion_canvas_length", "4"),
    ("diffusion_max_steps", 0),
    ("diffusion_max_steps", 1025),
    ("diffusion_max_steps", 2.5),
    ("diffusion_strategy", "unheard_of"),
    ("diffusion_noise_schedule", "unheard_of"),
    ("diffusion_adaptive_unmasking", 2),
    ("diffusion_adaptive_unmasking", "yes"),
    ("diffusion_remasking", "unheard_of"),
    ("diffusion_trace", "unheard_of"),
    ("diffusion_trace", 1),
    ("diffusion_mode", "unheard_of"),
    ("diffusion_mode", ["ar"]),
    ("diffusion_foo", 1),
    ("foo", 1),
]
"""Names in `vllm_xargs` and their values; the message has both."""

BAD_FIELDS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("temperature", -1, ("temperature", "-1")),
    ("temperature", "hot", ("temperature", "number")),
    ("top_p", 0, ("top_p", "0")),
    ("top_k", -2, ("top_k", "-2")),
    ("min_p", 2, ("min_p", "2")),
    ("max_tokens", 0, ("max_tokens", "0")),
    ("n", 2, ("n must be 1", "2")),
    ("logprobs", 21, ("logprobs", "21", "20")),
    ("logprobs", -2, ("logprobs", "-2")),
    ("prompt_logprobs", 21, ("prompt logprobs", "21", "20")),
    ("logit_bias", {"320": 1}, ("logit_bias", "[320]")),
    ("logit_bias", {"five": 1}, ("logit_bias", "['five']")),
    ("presence_penalty", 2.5, ("presence_penalty", "2.5")),
    ("frequency_penalty", -2.5, ("frequency_penalty", "-2.5")),
    ("repetition_penalty", 0, ("repetition_penalty", "0.0")),
    ("min_tokens", 49, ("min_tokens", "49", "48")),
    ("bad_words", [" "], ("bad_words", "[' ']")),
    ("bad_words", [f"a{i}" for i in range(129)], ("bad words", "128")),
    ("allowed_token_ids", [], ("allowed_token_ids", "[]")),
    ("allowed_token_ids", [320], ("allowed_token_ids", "[320]")),
    ("allowed_token_ids", [3, 3], ("allowed_token_ids", "[3, 3]", "mask token")),
    ("stop_token_ids", [99999], ("stop_token_ids", "99999")),
    ("thinking_token_budget", 3, ("thinking_token_budget", "3")),
    ("kv_transfer_params", {"a": 1}, ("kv_transfer_params", "{'a': 1}")),
    ("response_format", SCHEMA, ("structured_outputs", "{'type': 'object'}")),
    ("response_format", {"type": "json_object"}, ("structured_outputs", "json_object=True")),
    ("structured_outputs", {"regex": "a+"}, ("structured_outputs", "'a+'")),
    ("structured_outputs", {"choice": ["a", "b"]}, ("structured_outputs", "['a', 'b']", "use diffusion_mode 'ar'")),
]
"""Fields of a greedy block-filling request of 48 tokens, their values, and how the message names them."""
