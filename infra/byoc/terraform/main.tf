# What agentvm needs in an AWS account in which it launches VMs: a role for the control plane, which can end only what it
# has launched, and a role for the VMs, which can read their start secret and nothing else. The same as ../agentvm.yaml.

terraform {
  required_version = ">= 1.3"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0, < 7.0"
    }
  }
}

variable "cluster" {
  type        = string
  description = "The installation's uuid, from SELECT installation_id FROM agentvm.installation"
  validation {
    condition     = can(regex("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", var.cluster))
    error_message = "The uuid in lower case."
  }
}

variable "control_plane_arn" {
  type        = string
  description = "ARN of the user, role or account (arn:aws:iam::123456789012:root) by which the control plane assumes the role"
  validation {
    condition     = can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(root|(user|role)/[A-Za-z0-9+=,.@_/-]+)$", var.control_plane_arn))
    error_message = "The ARN of an IAM user, an IAM role or an account."
  }
}

variable "external_id" {
  type        = string
  description = "The external id that agentvm made for the team, from SELECT external_id FROM agentvm.team"
  validation {
    condition     = can(regex("^[A-Za-z0-9+=,.@:/-]{16,}$", var.external_id)) && length(var.external_id) <= 1224
    error_message = "At least 16 characters that AWS allows in an external id."
  }
}

variable "region" {
  type        = string
  description = "The region in which VMs may be launched, or * for any"
  default     = "*"
  validation {
    condition     = can(regex("^(\\*|[a-z]{2}(-[a-z]+)+-[0-9]+)$", var.region))
    error_message = "A region such as us-east-1, or *."
  }
}

data "aws_partition" "here" {}
data "aws_caller_identity" "here" {}

locals {
  ec2        = "arn:${data.aws_partition.here.partition}:ec2:${var.region}:${data.aws_caller_identity.here.account_id}"
  spot_role  = "arn:${data.aws_partition.here.partition}:iam::${data.aws_caller_identity.here.account_id}:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
  images     = "arn:${data.aws_partition.here.partition}:ec2:${var.region}::image/*"
  parameters = "arn:${data.aws_partition.here.partition}:ssm:${var.region}:${data.aws_caller_identity.here.account_id}:parameter/agentvm/${var.cluster}/*"

  instance_trust = {
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "ec2.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  }

  # by its exact name, which has the session's uuid in it: there is no way to list names
  instance_policy = {
    Version = "2012-10-17"
    Statement = [{
      Sid      = "ReadStartSecret"
      Effect   = "Allow"
      Action   = "ssm:GetParameter"
      Resource = local.parameters
    }]
  }

  control_plane_trust = {
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { AWS = var.control_plane_arn }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "sts:ExternalId" = var.external_id } }
    }]
  }

  control_plane_policy = {
    Version = "2012-10-17"
    Statement = [
      # an instance says whose it is, and has no IMDSv1
      {
        Sid      = "LaunchInstance"
        Effect   = "Allow"
        Action   = "ec2:RunInstances"
        Resource = "${local.ec2}:instance/*"
        Condition = {
          StringEquals = {
            "aws:RequestTag/agentvm-managed-by" = "agentvm"
            "aws:RequestTag/agentvm-cluster"    = var.cluster
            "ec2:MetadataHttpTokens"            = "required"
          }
        }
      },
      {
        Sid      = "LaunchVolume"
        Effect   = "Allow"
        Action   = "ec2:RunInstances"
        Resource = "${local.ec2}:volume/*"
        Condition = {
          StringEquals = {
            "aws:RequestTag/agentvm-managed-by" = "agentvm"
            "aws:RequestTag/agentvm-cluster"    = var.cluster
          }
        }
      },
      {
        Sid    = "LaunchFrom"
        Effect = "Allow"
        Action = "ec2:RunInstances"
        Resource = [
          local.images,
          "${local.ec2}:subnet/*",
          "${local.ec2}:security-group/*",
          "${local.ec2}:network-interface/*",
          "${local.ec2}:key-pair/*",
          "${local.ec2}:spot-instances-request/*",
        ]
      },
      # only as part of a launch: what is there already cannot be made to look like agentvm's
      {
        Sid      = "TagAtLaunch"
        Effect   = "Allow"
        Action   = "ec2:CreateTags"
        Resource = ["${local.ec2}:instance/*", "${local.ec2}:volume/*", "${local.ec2}:spot-instances-request/*"]
        Condition = {
          StringEquals = {
            "ec2:CreateAction"                  = "RunInstances"
            "aws:RequestTag/agentvm-managed-by" = "agentvm"
            "aws:RequestTag/agentvm-cluster"    = var.cluster
          }
          "ForAllValues:StringLike" = { "aws:TagKeys" = ["Name", "agentvm-*"] }
        }
      },
      {
        Sid      = "OwnInstances"
        Effect   = "Allow"
        Action   = ["ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances"]
        Resource = "${local.ec2}:instance/*"
        Condition = {
          StringEquals = {
            "aws:ResourceTag/agentvm-managed-by" = "agentvm"
            "aws:ResourceTag/agentvm-cluster"    = var.cluster
          }
        }
      },
      # before the instance of a persistent one is ended, or AWS would launch another
      {
        Sid      = "OwnSpotRequests"
        Effect   = "Allow"
        Action   = "ec2:CancelSpotInstanceRequests"
        Resource = "${local.ec2}:spot-instances-request/*"
        Condition = {
          StringEquals = {
            "aws:ResourceTag/agentvm-managed-by" = "agentvm"
            "aws:ResourceTag/agentvm-cluster"    = var.cluster
          }
        }
      },
      # EC2 knows no narrower right to look
      {
        Sid      = "Look"
        Effect   = "Allow"
        Action   = "ec2:DescribeInstances"
        Resource = "*"
      },
      {
        Sid       = "PassInstanceRole"
        Effect    = "Allow"
        Action    = "iam:PassRole"
        Resource  = aws_iam_role.instance.arn
        Condition = { StringEquals = { "iam:PassedToService" = ["ec2.amazonaws.com", "ec2.amazonaws.com.cn"] } }
      },
      # an account's first spot instance ever needs a role of AWS's own
      {
        Sid       = "SpotRole"
        Effect    = "Allow"
        Action    = "iam:CreateServiceLinkedRole"
        Resource  = local.spot_role
        Condition = { StringEquals = { "iam:AWSServiceName" = "spot.amazonaws.com" } }
      },
      # written before the launch, removed after the start; never read
      {
        Sid      = "StartSecrets"
        Effect   = "Allow"
        Action   = ["ssm:PutParameter", "ssm:DeleteParameter"]
        Resource = local.parameters
      },
      # for check_provider(), to say what a refusal was about
      {
        Sid      = "Explain"
        Effect   = "Allow"
        Action   = "sts:DecodeAuthorizationMessage"
        Resource = "*"
      },
    ]
  }
}

resource "aws_iam_role" "instance" {
  name_prefix        = "agentvm-instance-"
  description        = "VMs of agentvm; read their start secret and nothing else"
  assume_role_policy = jsonencode(local.instance_trust)
}

resource "aws_iam_role_policy" "instance" {
  name   = "start-secret"
  role   = aws_iam_role.instance.id
  policy = jsonencode(local.instance_policy)
}

resource "aws_iam_instance_profile" "instance" {
  name_prefix = "agentvm-instance-"
  role        = aws_iam_role.instance.name
}

resource "aws_iam_role" "control_plane" {
  name_prefix          = "agentvm-control-plane-"
  description          = "The control plane of agentvm"
  max_session_duration = 3600
  assume_role_policy   = jsonencode(local.control_plane_trust)
}

# By itself, so that it can also be attached to a user whose access key the team gives to agentvm
resource "aws_iam_policy" "control_plane" {
  name_prefix = "agentvm-control-plane-"
  description = "What agentvm calls, on what it has launched only"
  policy      = jsonencode(local.control_plane_policy)
}

resource "aws_iam_role_policy_attachment" "control_plane" {
  role       = aws_iam_role.control_plane.name
  policy_arn = aws_iam_policy.control_plane.arn
}

output "role_arn" {
  description = "For option role_arn of agentvm.set_provider()"
  value       = aws_iam_role.control_plane.arn
}

output "policy_arn" {
  description = "To attach to a user, where an access key is used in place of the role"
  value       = aws_iam_policy.control_plane.arn
}

output "instance_profile" {
  description = "For option instance_profile of agentvm.set_provider()"
  value       = aws_iam_instance_profile.instance.name
}
