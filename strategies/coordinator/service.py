"""The systemd unit that `fedmed coordinator service` prints."""

import getpass
import shlex
import shutil
import sys
from pathlib import Path

UNIT = """\
# Save as /etc/systemd/system/fedmed-coordinator.service, then:
#   systemctl daemon-reload && systemctl enable --now fedmed-coordinator
[Unit]
Description=fedmed coordinator {name}
Wants=network-online.target
After=network-online.target
# A coordinator that cannot start is tried for ever, not five times in ten seconds.
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
WorkingDirectory={folder}
ExecStart={command}
Restart=on-failure
RestartSec=5
# It ends its own processes, and puts runs away so that they go on later.
KillMode=mixed
TimeoutStopSec=60
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ProtectHome={home}
ReadWritePaths={folder}
ProtectKernelTunables=true
ProtectControlGroups=true
RestrictSUIDSGID=true
Environment=HF_HUB_OFFLINE=1 FLWR_TELEMETRY_ENABLED=0 OMP_NUM_THREADS=1

[Install]
WantedBy=multi-user.target
"""


def unit(folder: Path, name: str) -> str:
    """The text of the unit of the coordinator in a folder, for this account and this installation."""
    program = shutil.which("fedmed") or str(Path(sys.argv[0]).absolute())
    command = shlex.join([program, "coordinator", "start", str(folder)])
    # Models and the installation may lie in a home.
    home = (
        "false"
        if any(path.startswith(("/home/", "/root/")) for path in (str(folder), program))
        else "read-only"
    )
    # % begins a specifier.
    return UNIT.format(
        name=name.replace("%", "%%"),
        user=getpass.getuser(),
        folder=str(folder).replace("%", "%%"),
        command=command.replace("%", "%%"),
        home=home,
    )
