"""The command. Imports the nodes lazily; nobody imports it."""
