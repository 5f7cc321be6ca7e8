"""How the daemon of a site's folder is, asked from outside it, and in words."""

import http.client
import json
import time
from pathlib import Path
from typing import Any

from clients.asked import shown
from clients.health import IN_CONTACT
from clients.pause import is_paused
from clients.start import PLACE, is_running

# What to do about a refusal, by its reason.
ADVICE = {
    "unknown-node": "ask the coordinator to admit the site: fedmed coordinator admit NAME.pub (it stands in DIR)",
    "expelled": "ask the coordinator why; it can admit the site again",
    "wrong-ca": "ask the coordinator for its ca.pem and put it into DIR",
    "certificate-expired": "ask the coordinator to renew it: fedmed coordinator rotate",
    "clock": "set this machine's clock: timedatectl set-ntp true",
}


def status(folder: Path) -> dict[str, Any]:
    """The daemon's own values, or `state` stopped or silent where none answers; `next` says what to do."""
    if not is_running(folder):
        found: dict[str, Any] = {"state": "stopped", "next": f"start it: fedmed site start {folder}"}
    else:
        found = _asked(folder) or {
            "state": "silent",
            "next": "a daemon runs and its health endpoint does not answer: see its log, and health_port in site.yaml",
        }
    return {"paused": is_paused(folder)} | found


def _asked(folder: Path) -> dict[str, Any] | None:
    try:
        port = json.loads((folder / PLACE).read_text())["health"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
        try:
            connection.request("GET", "/health")
            values: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None
    advice = ADVICE.get(values.get("refusal", ""))
    return values | ({"next": advice.replace("DIR", str(folder))} if advice else {})


def is_well(values: dict[str, Any]) -> bool:
    """Whether a daemon runs and is in contact with its coordinator."""
    return values["state"] in IN_CONTACT


def in_words(folder: Path, values: dict[str, Any]) -> str:
    """Some lines for a person."""
    lines = [f"{folder}: {values['state']}"]
    if "site" in values:
        lines = [f"site '{values['site']}' at {values['coordinator']}: {values['state']}"]
        if values["reason"]:
            lines.append(f"  {values['reason']}")
        contact = values["last_contact"]
        ago = "never" if contact is None else f"{max(0.0, time.time() - contact):.0f} s ago"
        lines.append(f"  last contact: {ago}")
        if values["run"] is not None:
            lines.append(f"  last run: {shown(values['run'])}, round {values['round']}")
    if values["paused"]:
        lines.append(f"  paused, new runs are refused; take them again: fedmed site pause {folder} --resume")
    if "next" in values:
        lines.append(f"next: {values['next']}")
    return "\n".join(lines)
