"""What the commands of ``hub`` do, as functions; each command calls the one of its name.

>>> hub.push("./tone", name="acme/tone", version="1.0.0", base="builtin:tiny-lm")
>>> hub.push("acme/tone@1.0.0", to="team")
>>> hub.pull("acme/tone>=1,<2", from_="team", out="./tone")

``store`` is the one of HUB_HOME where none is given; `hub.Store` lists and searches it. A place (``to``, ``from_``,
``at``) is the name of a remote, a URL or a path. ``say`` is told what a person may want to know, a sentence at a time;
what must not be missed is a `HubWarning`. All errors are `HubError`.
"""
