"""SmolLM2: a list of objects in tags."""

from router.serving.tool_format import TOOL_FORMATS, ToolFormat

TOOL_FORMATS.add(
    "smollm2",
    ToolFormat("smollm2", marks=("<tool_call>[",), begin="<tool_call>", end="</tool_call>", listed=True),
)
