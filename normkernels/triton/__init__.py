"""Parts of the Triton implementations that primitives share."""
