"""How a command of the terminal runs: alone or shared by processes, its mistakes told once."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer
from transformers.utils import logging

from mxq import latency, tables
from mxq.distributed import PeerError, Team, team_of
from mxq.workspace import library_versions


def guarded(run: Callable[[], None]) -> None:
    """Run a command; a mistake of the user's ends it with one message and status 1."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers
    try:
        run()
    except typer.Exit:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        tables.show_error(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        tables.show_error("interrupted; the same command goes on from the last finished layer")
        sys.exit(130)


def shared(run: Callable[[Team], None]) -> None:
    """Run a command that several processes may share; one of them shows what went wrong."""

    def join() -> None:
        speaks = True
        try:
            with team_of(os.environ, library_versions()) as team:
                speaks = team.leads
                run(team)
        except PeerError as error:
            if not error.is_mine_to_tell:
                raise typer.Exit(1) from error
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if not speaks:
                raise typer.Exit(1) from error
            raise
        except KeyboardInterrupt:
            if not speaks:
                sys.exit(130)
            raise

    guarded(join)


def profiles_folder() -> Path:
    """Where measured profiles of devices are kept for this user."""
    return latency.profile_folder(os.environ.get("XDG_CACHE_HOME"))
