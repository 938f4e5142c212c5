"""The live pages: what they show, their templates, and the server."""
