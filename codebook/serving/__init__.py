"""The service: pruned chat completions in OpenAI's API, and what is beside them, each in a file with a `router`."""
