"""Mistral: a token and a list of objects; its templates want ids of nine letters."""

from router.serving.tool_format import TOOL_FORMATS, ToolFormat, short_id

TOOL_FORMATS.add(
    "mistral",
    ToolFormat("mistral", marks=("[TOOL_CALLS]",), begin="[TOOL_CALLS]", listed=True, identifier=short_id),
)
