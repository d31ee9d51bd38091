"""Hermes, Qwen, SmolLM3 and many others: one object in tags for each call."""

from router.serving.tool_format import TOOL_FORMATS, ToolFormat

TOOL_FORMATS.add(
    "hermes", ToolFormat("hermes", marks=("<tool_call>",), begin="<tool_call>", end="</tool_call>", inner="\n")
)
