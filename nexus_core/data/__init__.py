"""From files on disk to batches of tokens: records, formats, documents, sampling, packing, mixing."""
