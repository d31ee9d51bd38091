"""`hub import hf://owner/name@rev`: the client against a real registry over HTTP."""

import pytest

pytest.importorskip("peft")

IMPORT = """
import os, tempfile, io, contextlib
os.environ["HUB_HOME"] = tempfile.mkdtemp()
from hub.cli import main
from hub.store import Store
import compose, peft
def hub(*words):
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            main(list(words))
        except SystemExit as done:
            return [done.code or 0, told.getvalue()]
facts = ("--name", "acme/mine", "--base", "builtin:tiny-lm")
model = peft.get_peft_model(compose.load("builtin:tiny-lm"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
api.create_repo("owner/tone")
model.push_to_hub("owner/tone")
commit = api.model_info("owner/tone").sha
"""


def test_import_records_the_commit_and_says_what_is_wrong(site) -> None:
    found = site.stock(
        IMPORT
        + """
done = hub("import", "hf://owner/tone", "--version", "1.0", *facts)
assert done[0] == 0, done
assert Store().get("acme/mine@1.0").manifest.lineage.run == f"hf://owner/tone@{commit}"
assert hub("import", f"hf://owner/tone@{commit}", "--version", "1.1", *facts)[0] == 0
unknown = hub("import", "hf://owner/none", "--version", "2", *facts)
revision = hub("import", "hf://owner/tone@nothing", "--version", "2", *facts)
print(json.dumps([unknown, revision, [a.facts.version for a in Store().list()]]))
"""
    )
    assert found[0][0] == found[1][0] == 1
    assert "does not give hf://owner/none" in found[0][1]
    assert "does not give hf://owner/tone@nothing" in found[1][1]
    assert found[2] == ["1.0", "1.1"]
