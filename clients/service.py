"""A systemd unit for a site's daemon: it sees the system read-only, and writes to its own folder and cache alone."""

from pathlib import Path

UNIT = """\
# Written by: fedmed site service. Copy it to /etc/systemd/system/{unit}, then:
#   systemctl daemon-reload && systemctl enable --now {unit}
[Unit]
Description=fedmed site {name}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command} site start {folder}
User={user}
WorkingDirectory={directory}
Environment={environment}
# What is compiled on the first start is kept for the next.
CacheDirectory=%p
CacheDirectoryMode=0700
Environment=NUMBA_CACHE_DIR=%C/%p
Restart=on-failure
RestartSec=10
# It ends after the round that it is at; what is killed counts as spent.
TimeoutStopSec=15min
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={folder}
PrivateTmp=yes
ProtectProc=invisible
ProtectClock=yes
# After which no device may be used but what is named: GPUs, whose modules the machine has loaded.
DeviceAllow=char-nvidia* rw
DeviceAllow=char-kfd rw
DeviceAllow=char-drm rw
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
CapabilityBoundingSet=
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


def unit(folder: Path, *, name: str, user: str, command: Path, home: Path, directory: Path) -> str:
    """The text of a unit.

    Args:
        folder: of the site.
        command: the installed `fedmed`.
        home: FEDMED_HOME, where pulled models are.
        directory: what paths in site.yaml are relative to.
    """
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name).strip("-")
    return UNIT.format(
        # In a description a percent sign begins a specifier; nothing else is special.
        name=name.replace("%", "%%"),
        unit=f"fedmed-site-{plain.lower() or 'own'}.service",
        command=_quoted(str(command)),
        folder=_quoted(str(folder)),
        # It takes the rest of the line as it is.
        directory=str(directory).replace("%", "%%"),
        user=user,
        environment=_quoted(f"FEDMED_HOME={home}", variables=False),
    )


def _quoted(text: str, *, variables: bool = True) -> str:
    """One word of a unit's line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped.replace("$", "$$") if variables else escaped}"'
