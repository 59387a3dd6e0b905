"""The stack: tokens or embeddings, documents and State in; hidden states out. Written for one device."""
