"""Keys of a team's own on the S3 server, which can be taken away while they are used."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import boto3
from devcluster.s3 import S3Access

_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::*"}],
}


class TeamKeys:
    """A user of the server's own IAM with one pair of keys."""

    def __init__(self, administrator: S3Access, user: str) -> None:
        self._administrator = administrator
        self._user = user
        # Any: the stubs of boto3 that are installed are those of S3.
        self._iam: Any = boto3.client(
            "iam",
            endpoint_url=administrator.endpoint,
            aws_access_key_id=administrator.access_key,
            aws_secret_access_key=administrator.secret_key,
            region_name="us-east-1",
        )
        self._iam.create_user(UserName=user)
        self._iam.put_user_policy(
            UserName=user, PolicyName="all", PolicyDocument=json.dumps(_POLICY)
        )
        self._keys: Any = self._iam.create_access_key(UserName=user)["AccessKey"]

    def access(self) -> S3Access:
        """The same server and bucket, opened by these keys."""
        return replace(
            self._administrator,
            access_key=self._keys["AccessKeyId"],
            secret_key=self._keys["SecretAccessKey"],
        )

    def revoke(self) -> None:
        """From now on the server knows no such key."""
        self._iam.update_access_key(
            UserName=self._user, AccessKeyId=self._keys["AccessKeyId"], Status="Inactive"
        )
