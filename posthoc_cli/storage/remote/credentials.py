"""Credentials for S3 from the profiles that AWS's own programs share."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from posthoc_cli.errors import UsageError
from posthoc_cli.storage.places import Url, is_host

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


def aws_options(url: Url) -> dict[str, Any]:
    """What a profile says that the environment doesn't: keys, region, endpoint.

    Without keys in the environment the profile AWS_PROFILE, or `default`, is asked. One that signs
    on or takes a role needs boto3. Raises UsageError for a profile that isn't there, and for an
    endpoint that is no URL.
    """
    for name in _ENDPOINTS:
        _check_endpoint(name, os.environ.get(name))
    named = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    profile = named or "default"
    keys = _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    config = _section(
        "AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"
    )
    if keys is None and config is None:
        if named:
            raise UsageError(str(url), f"there is no AWS profile '{named}'", "check AWS_PROFILE")
        return {}
    said = {**(config or {}), **(keys or {})}
    options: dict[str, Any] = {}
    if "region" in said and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        options["region"] = said["region"]
    if "endpoint_url" in said and not any(name.startswith("AWS_ENDPOINT") for name in os.environ):
        options["endpoint"] = said["endpoint_url"]
        _check_endpoint(f"endpoint_url of the AWS profile '{profile}'", said["endpoint_url"])
    if any(name in os.environ for name in _KEYS):
        return options
    if "aws_access_key_id" in said and "aws_secret_access_key" in said:
        options["access_key_id"] = said["aws_access_key_id"]
        options["secret_access_key"] = said["aws_secret_access_key"]
        if "aws_session_token" in said:
            options["session_token"] = said["aws_session_token"]
    elif any(name.startswith(("sso_", "role_arn", "credential_process")) for name in said):
        if importlib.util.find_spec("boto3") is None:
            problem = f"the AWS profile '{profile}' signs on, or takes a role, which needs boto3"
            raise UsageError(str(url), problem, "pip install boto3, or set AWS_ACCESS_KEY_ID")
        import boto3  # type: ignore[import-untyped]
        from obstore.auth.boto3 import Boto3CredentialProvider

        session = boto3.Session(profile_name=named)
        options["credential_provider"] = Boto3CredentialProvider(session)
    return options


def check_environment(scheme: str) -> None:
    """Raise UsageError for variables that obstore would panic at."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if not os.environ.get(name, "").isprintable():
            raise UsageError(name, "has a line break, or the like", "set it without")
    for name in _ENDPOINTS.get(scheme, ()):
        _check_endpoint(name, os.environ.get(name))


def _check_endpoint(name: str, endpoint: str | None) -> None:
    """Raise UsageError for what leads to another store than the usual one, and is no URL."""
    if endpoint is None:
        return
    match = re.fullmatch(r"https?://([^/\s?#]+)(/[^\s?#]*)?", endpoint, re.IGNORECASE)
    if match and "@" in match[1]:
        remedy = "leave them out: keys are given by variables of their own"
        raise UsageError(name, "has a name or a password", remedy)
    if match is None or not is_host(match[1]):
        raise UsageError(name, f"'{endpoint}' is no URL", "write http:// or https:// and the host")


def _section(variable: str, name: str, section: str) -> dict[str, str] | None:
    """A section of the file that `variable` names, or of `~/.aws/<name>`."""
    path = Path(os.environ.get(variable) or Path.home() / ".aws" / name)
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read(path, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError):
        return None
    return dict(parser[section]) if section in parser else None
