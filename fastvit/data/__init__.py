"""Images: decoding, folders, datasets of the hub, streams, and leaves drawn by code."""
