"""``vllm-twotower watch``: blocks being filled, in the terminal, on a page and in a picture. No server imports it."""
