"""The pocket world: small painted scenes, prompts, edits and questions about them, and the judge of every answer."""
