"""The coordinator of a consortium: its folder, its processes, its commands."""
