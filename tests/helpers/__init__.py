"""What several tests share: tiny models and runs, homes, ports, waiting."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
