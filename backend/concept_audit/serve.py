"""Starting the dashboard."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from concept_audit.errors import AuditError

CACHE_VARIABLE = "CONCEPT_AUDIT_CACHE"
AUDIT_VARIABLE = "CONCEPT_AUDIT_NAME"
READ_ONLY_VARIABLE = "CONCEPT_AUDIT_READ_ONLY"
ALLOWED_VARIABLE = "CONCEPT_AUDIT_ALLOWED"
DEVICE_VARIABLE = "CONCEPT_AUDIT_DEVICE"
TRUST_VARIABLE = "CONCEPT_AUDIT_TRUST_REMOTE_CODE"


def dashboard() -> Path:
    """The script of the dashboard.

    Raises:
        AuditError: it is not installed, or what it needs is not.
    """
    spec = importlib.util.find_spec("concept_audit_app")
    lacking = any(importlib.util.find_spec(name) is None for name in ("streamlit", "plotly"))
    if spec is None or not spec.submodule_search_locations or lacking:
        raise AuditError("the dashboard is not installed; bring it with `pip install 'concept-audit[app]'`")
    return Path(spec.submodule_search_locations[0]) / "main.py"


def serve(
    root: Path | None,
    cache: Path,
    address: str,
    port: int | None,
    headless: bool,
    read_only: bool = False,
    allowed: Sequence[str] = (),
    device: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Run the dashboard until it is stopped.

    Args:
        root: the audit to show, and no other; None for all that lie in `cache`.
        read_only: offer nothing that changes an audit.
        allowed: who is let in, where people log in; see `concept_audit.addresses.is_allowed`.
        device: where the models run; None for where each audit was built.
        trust_remote_code: run Python code that comes with a model.

    Returns:
        Streamlit's exit status.
    """
    # -P: the working directory may be a stranger's data folder, with a pandas.py of its own.
    command = [sys.executable, "-P", "-m", "streamlit", "run", str(dashboard()), "--server.address", address]
    command += ["--browser.gatherUsageStats", "false", "--server.enableWebsocketCompression", "true"]
    if port is not None:
        command += ["--server.port", str(port)]
    if headless:
        command += ["--server.headless", "true"]
    environment = dict(os.environ)
    environment[CACHE_VARIABLE] = str((root.parent if root else cache).resolve())
    environment[READ_ONLY_VARIABLE] = "1" if read_only else "0"
    environment[ALLOWED_VARIABLE] = "\n".join(allowed)
    environment[DEVICE_VARIABLE] = device or ""
    environment[TRUST_VARIABLE] = "1" if trust_remote_code else "0"
    environment.pop(AUDIT_VARIABLE, None)
    if root:
        environment[AUDIT_VARIABLE] = root.resolve().name
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return subprocess.run(command, env=environment).returncode
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> NoReturn:
    """End when told to, and Streamlit with it, which would keep the port: `subprocess.run` kills what it has run."""
    raise SystemExit(128 + number)
