"""Llama 3.1 and later: an answer that is an object, with or without a token in front of it."""

from router.serving.tool_format import TOOL_FORMATS, ToolFormat

TOOL_FORMATS.add(
    "llama3",
    ToolFormat(
        "llama3", marks=("<|python_tag|>", '"parameters"'), begin="<|python_tag|>", arguments="parameters", bare=True
    ),
)
