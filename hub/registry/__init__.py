"""A self-hosted registry: the Hugging Face protocol and a web catalogue over one store.

How a Hugging Face repository maps onto artifacts
-------------------------------------------------
One repository is one name (``ns/name``); a tag that is a PEP 440 version is a published artifact.

- **Release.** Each published version is a root commit whose id is a function of its manifest alone, so two
  registries that hold the same artifact call it by the same 40 hex digits. Its tree is the artifact's files and
  ``module.json``. ``revision=`` takes a version (``1.0`` is ``1.0.0``), an alias, ``latest``, ``sha256:...`` or a
  commit id; an exact version also reaches a yanked one, as PEP 592 asks.
- **Draft.** A commit (``upload_folder``, ``push_to_hub``) adds a draft revision. Drafts are kept beside the store,
  never in it: nothing unchecked gets into the store. Any files that an artifact may hold can be in a draft; pickles
  never.
- **main** is the newest live version, unless someone committed after it: then it is that draft, since a client that
  has just pushed must read what it wrote. Tagging the draft makes ``main`` the newest version again. Who wants
  nothing but published bytes asks for a version, an alias or ``latest``.
- **Publishing** is tagging a draft with a version, which runs the push gates. With a ``module.json`` for exactly
  this name and version, every file and tensor must agree with it, and the artifact keeps its digest: this is how
  ``hub push --to hf://`` arrives. Without one, the facts are read from ``adapter_config.json`` and the card; the
  base is then recorded as unknown, never guessed. A ``module.json`` left over from a version published here keeps
  its facts when weights and config are unchanged, and is dropped otherwise. One of another name or of a version
  never published is refused.
- **Immutability.** A version never changes its bytes: committing to it is refused, tagging it again is a conflict
  (409), deleting its tag yanks it, tagging the same bytes again takes the yank back. Yanked versions are listed
  among the refs' ``converts``. Deleting a repository deletes its versions for good (409 where another artifact requires
  one) and leaves the name dead; the bytes go with the next ``hub gc``. Renaming works until there is a version.
- **As written.** A client reads what it wrote: the tag ``v1.0`` of version 1.0, ``gated="auto"``, names with capitals
  (which are compared without case), the commit that changed each file last, the YAML of its card.
- **Visibility.** Where there are tokens, a repository about which nobody has said it is private (``--visibility``).
- **Pins.** A commit that a client may have pinned is kept for ever, unless ``--keep-drafts`` says for how long.
- **Other tags** are aliases when they point at a release, and fixed names of a commit when they point at a draft.
- **Lost updates.** ``parentCommit`` must be the head of the branch (412 otherwise); a draft and the release made
  from it count as one.
"""
