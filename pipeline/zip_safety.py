"""What a zip archive's directory must not say (APPNOTE.TXT 6.3.10), looked at before a member is read.

Members are read by name into memory and never unpacked, so that a path could do no harm; one that leads out of its
folder is refused all the same, as no honest archive has any.
"""

import itertools
import re
import stat
import zipfile
from collections.abc import Sequence

MEMBER_BYTES = 512 << 20  # unpacked, all in memory at once; COCO's largest json has 448 MiB
RATIO = 200  # unpacked to packed: json packs to a quarter, pictures not at all, a bomb to a thousandth
RATIO_FROM = 1 << 20  # bytes unpacked, from which RATIO counts: what is smaller does no harm
TOTAL_RATIO = 20  # all members to the archive; one picture in a single colour is no bomb, nothing else is
TOTAL_FROM = 64 << 20  # bytes unpacked, from which TOTAL_RATIO counts
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others cannot be unpacked bit by bit, up to a size
ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags: the old way, the strong one, and with a masked directory
LEADS_OUT = re.compile(r"[/\\]|[A-Za-z]:|(?s:.*[/\\])?\.\.(?:[/\\]|\Z)")  # an absolute path, a drive, a part ".."
LOCAL_HEADER = 30  # bytes, without name and extra field


def fault(members: Sequence[zipfile.ZipInfo], archive_bytes: int) -> str | None:
    """What is wrong with the first member that is refused, or with all of them together."""
    for member in members:
        if words := _member_fault(member):
            return f"member {member.orig_filename!r} {words}"
    total = sum(member.file_size for member in members)
    if total > TOTAL_FROM and total > TOTAL_RATIO * archive_bytes:
        return (
            f"its {len(members):,} members unpack to {total:,} bytes, over {TOTAL_RATIO} times the archive's "
            f"{archive_bytes:,}"
        )
    for member in members:
        if not 0 <= member.header_offset <= archive_bytes - LOCAL_HEADER - member.compress_size:
            return f"member {member.orig_filename!r} lies outside of it"
    in_order = sorted(members, key=lambda member: member.header_offset)
    for member, following in itertools.pairwise(in_order):
        if member.header_offset + LOCAL_HEADER + member.compress_size > following.header_offset:
            return f"members {member.orig_filename!r} and {following.orig_filename!r} overlap"
    return None


def _member_fault(member: zipfile.ZipInfo) -> str | None:
    name = member.orig_filename  # zipfile cuts the other one at a NUL
    if LEADS_OUT.match(name):
        return "leads out of the archive"
    if "\\" in name or "\0" in name:
        return "has a backslash or NUL in its name"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link"
    if member.flag_bits & ENCRYPTED:
        return "is encrypted"
    if member.compress_type not in METHODS:
        return f"is packed by method {member.compress_type}, and stored and deflated members alone are read"
    if member.file_size > MEMBER_BYTES:
        return f"unpacks to {member.file_size:,} bytes, over {MEMBER_BYTES:,}"
    if member.file_size > RATIO_FROM and member.file_size > RATIO * member.compress_size:
        return f"unpacks from {member.compress_size:,} to {member.file_size:,} bytes, over {RATIO} times as many"
    return None
