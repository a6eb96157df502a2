"""The commands of the command line, grouped by topic. A command imports torch only when it needs it."""
