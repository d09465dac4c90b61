"""A corpus as a Lance table: any row by its number, and the people nearest to a face, without reading the rest.

One table, whose schema carries what `lora.json` of the Hub's dataset says, under the key `lora`. https://lance.org/format
"""

from __future__ import annotations

import json
import os
from datetime import timedelta

import pyarrow as pa

from lora_diffusion.corpus.hub import HubDataset
from lora_diffusion.extras import needs
from lora_diffusion.storage import Store


def write_lance(dataset: HubDataset, store: Store) -> None:
    """Write all rows of `dataset`; an earlier table in this place goes, with all its versions. Raises MissingExtra, ValueError, OSError."""
    with needs("lance"):
        import lance
    schema = dataset.schema.with_metadata({"lora": json.dumps(dataset.made_with())})
    batches = (batch for table in dataset.tables() for batch in table.cast(schema).to_batches())
    written = lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches), store.uri, mode="overwrite", storage_options=_options(store)
    )
    written.cleanup_old_versions(
        older_than=timedelta(0), delete_unverified=True
    )  # whoever left the corpus leaves the table


def _options(store: Store) -> dict[str, str]:
    """Lance reads AWS's variables by itself, but for a server that is not Amazon's, which it also asks for the bucket's region."""
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if store.local or not address:
        return {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"aws_endpoint": address, "allow_http": str(address.startswith("http:")).lower(), "aws_region": region}
