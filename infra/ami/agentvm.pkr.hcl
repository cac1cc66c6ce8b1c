# An image for VMs of provider ec2: Ubuntu 24.04 with node, python 3.13, git, gh, uv, bun, and agentvm-runtime as a unit. See
# README.md; what goes into it is in pins, how in install.

variable "region" {
  type        = string
  description = "Where the image is built."
}

variable "ubuntu_serial" {
  type        = string
  description = "The release of Canonical's image that is built upon, such as 20261101: a date, so that a build can be repeated."
  validation {
    condition     = length(var.ubuntu_serial) > 0 && regex_replace(var.ubuntu_serial, "^20[0-9]{6}([.][0-9]+)?$", "") == ""
    error_message = "The serial of a release of Ubuntu 24.04, such as 20261101."
  }
}

variable "version" {
  type        = string
  description = "The version of agentvm, for the image's name, description and tags."
  validation {
    condition     = length(var.version) > 0 && regex_replace(var.version, "^[0-9A-Za-z][0-9A-Za-z.-]{0,31}$", "") == ""
    error_message = "At most 32 letters, digits, dots and hyphens: EC2 takes descriptions in ASCII only, and drops the finished image otherwise."
  }
}

variable "runtime" {
  type        = string
  description = "The static agentvm-runtime that make runtime has built."
  default     = "../../src/runtime/agentvm-runtime"
}

variable "instance_type" {
  type        = string
  description = "What the image is built on; x86_64."
  default     = "t3.medium"
}

variable "subnet_id" {
  type        = string
  description = "Where it is built; empty: in the default VPC."
  default     = ""
}

variable "ami_users" {
  type        = list(string)
  description = "Accounts that may launch the image, 12 digits each."
  default     = []
}

variable "ami_regions" {
  type        = list(string)
  description = "Regions that it is copied to."
  default     = []
}

variable "encrypt" {
  type        = bool
  description = "Whether its snapshots are encrypted. Other accounts can use such an image only with a kms_key_id that they may use, too."
  default     = false
}

variable "kms_key_id" {
  type        = string
  description = "The key, if it is encrypted; empty: the account's own for EBS."
  default     = ""
}

variable "volume_gib" {
  type        = number
  description = "Size of the root volume, which a profile may enlarge."
  default     = 8
}

locals {
  time = formatdate("YYYYMMDDhhmmss", timestamp())
  # found by infra/ami/clean
  tags = {
    "agentvm-managed-by" = "agentvm"
    "agentvm-image"      = "build"
    "agentvm-version"    = var.version
    "agentvm-ubuntu"     = var.ubuntu_serial
  }
}

source "amazon-ebs" "agentvm" {
  region        = var.region
  instance_type = var.instance_type
  subnet_id     = var.subnet_id
  ssh_username  = "ubuntu"

  source_ami_filter {
    owners = ["099720109477"] # Canonical
    filters = {
      name                = "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-${var.ubuntu_serial}"
      architecture        = "x86_64"
      virtualization-type = "hvm"
      root-device-type    = "ebs"
    }
  }

  # the machine it is built on, and VMs made of it: IMDSv2 only
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  imds_support = "v2.0"

  launch_block_device_mappings {
    device_name           = "/dev/sda1"
    volume_size           = var.volume_gib
    volume_type           = "gp3"
    iops                  = 3000
    throughput            = 125
    delete_on_termination = true
  }

  ami_name                  = "agentvm-${var.version}-${local.time}"
  ami_description           = "agentvm ${var.version}: Ubuntu 24.04 (${var.ubuntu_serial}), node 24, python 3.13, git, gh, uv, bun"
  ami_users                 = var.ami_users
  ami_regions               = var.ami_regions
  encrypt_boot              = var.encrypt
  kms_key_id                = var.kms_key_id
  ena_support               = true
  ssh_clear_authorized_keys = true

  tags            = local.tags
  snapshot_tags   = local.tags
  run_tags        = merge(local.tags, { Name = "agentvm-image-build" })
  run_volume_tags = local.tags
}

build {
  sources = ["source.amazon-ebs.agentvm"]

  provisioner "shell" {
    inline = ["cloud-init status --wait", "mkdir -m 700 /tmp/agentvm"]
  }
  provisioner "file" {
    sources = [
      "${path.root}/install",
      "${path.root}/pins",
      "${path.root}/../systemd/agentvm-runtime.service",
      "${path.root}/../microvm/agentvm-boot",
      "${path.root}/../microvm/agentvm-boot.service",
    ]
    destination = "/tmp/agentvm/"
  }
  provisioner "file" {
    source      = "${path.root}/${var.runtime}"
    destination = "/tmp/agentvm/agentvm-runtime"
  }
  provisioner "shell" {
    inline = ["sudo bash /tmp/agentvm/install", "sudo bash /tmp/agentvm/install --forget", "rm -rf /tmp/agentvm"]
  }

  post-processor "manifest" {
    output = "agentvm-image.json"
  }
}
