"""`fetch_alone.py REFERENCE DIRECTORY [CA]`: our fetch engine without FUSE: a whole model into a cache area, checked by its
block index. With a CA the registry is spoken to over TLS. Prints the files that hold it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from csi.cache.blob import BlobWriter
from csi.fetcher.engine import EngineSettings, FetchEngine
from csi.fetcher.index_source import load_index
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.sources import SourceSettings, open_source
from csi.registry_hosts import RegistryHost
from csi.tree.model import BlobSpec


def main() -> int:
    """The exit status."""
    reference, directory = Reference.parse(sys.argv[1]), Path(sys.argv[2])
    hosts: tuple[RegistryHost, ...] = ()
    if len(sys.argv) > 3:
        authority = reference.registry
        hosts = (RegistryHost(scheme="https", authority=authority, path="/v2", ca=(Path(sys.argv[3]).read_text(),)),)
    rules = AddressRules(plain_http_hosts=frozenset([reference.registry]))
    source = open_source(reference, SourceSettings(rules=rules, hosts=hosts))
    area_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    assert reference.digest is not None
    index, _ = load_index(area_fd, source, reference.digest, None)
    specs = [BlobSpec(digest, hashes.size_bytes) for digest, hashes in index.items()]
    writers = [BlobWriter.open(area_fd, spec.digest, spec.size_bytes, b"-" * 16, recheck=True) for spec in specs]
    complete = threading.Semaphore(0)
    engine = FetchEngine(
        [source],
        specs,
        writers,
        EngineSettings(threads=5),  # one of them is for readers only
        on_block=lambda blob, block: None,
        on_failed=lambda blob, block, error: sys.exit(str(error)),
        on_wrong=lambda error: sys.exit(str(error)),
        on_complete=lambda blob: complete.release(),
        hashes=[index[spec.digest] for spec in specs],
    )
    engine.start()
    for _ in specs:
        if not complete.acquire(timeout=600):
            raise SystemExit("the model did not come within ten minutes")
    engine.stop()
    source.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
