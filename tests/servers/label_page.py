"""A label page in a separate process that a test can kill: ITEMS DATABASE OVERLAP PORT TOKEN."""

from __future__ import annotations

import sys
from pathlib import Path

from simpo.labeling.server import listen, make_app, serve
from simpo.labeling.session import Session, Store, load_items

items, database, overlap, port, token = sys.argv[1:]
listening = listen(int(port))
session = Session(load_items(Path(items)), Store(Path(database)), seed=0, overlap=float(overlap))
print("ready", flush=True)
serve(make_app(session, token=token, guidelines="Be fair."), listening)
