"""The disk: names, manifests, the root's lock, the catalog of what is committed, and which of it goes. No torch here."""
